"""TensorRT-LLM checkpoints: a config.json of their own and one file of tensors a rank, fused and split.

Layouts as Model Optimizer 0.47 writes them. `modules` says which linears lie in which tensor, `config` what config.json
says, `files` shows such a folder as a Hugging Face directory, `writer` makes one.
"""
