"""The experts' products on int8 activations with a scale for every four columns."""
