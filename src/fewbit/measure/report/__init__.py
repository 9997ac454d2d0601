"""A run on one page: what a folder holds (`collect`), figures of it (`figures`, `draw`), and the page (`page`)."""
