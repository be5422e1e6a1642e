"""The torch modules: the layer, its parameters, its fast paths, and functions over whole models."""
