"""How weights lie in files, one file a dialect: the `Packing`s that the formats choose from."""
