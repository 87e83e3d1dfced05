"""The methods that turn a layer's activations into concepts, one file each, and their baselines."""
