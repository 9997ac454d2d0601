"""Row-wise operations of the GPU path. Their definition is the plain torch of `fewbit.model.decoder`."""
