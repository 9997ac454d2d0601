"""GGUF files, the format of llama.cpp: one file with metadata, tokenizer and weights, shown as a model directory."""
