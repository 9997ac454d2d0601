"""Questions with known answers: what a task is, its prompts, who answers, and what that is worth."""
