"""Operations: a folder for each one that has kernels, and what the device is."""
