"""Make it run: requests, steps, blocks, sampling, and the clients that talk to an engine here or in another process."""
