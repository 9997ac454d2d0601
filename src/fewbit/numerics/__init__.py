"""What bits mean: element sets, formats, the reference rounding, quantized tensors, bit packing."""
