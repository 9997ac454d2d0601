"""NeMo archives (.nemo): a tar with model_config.yaml, torch weights and the tokenizer's files. They are only read.

Nothing is unpacked and no pickle is executed: `archive` knows where each member lies, `weights` finds the tensors in
it, `files` shows all as a Hugging Face directory.
"""
