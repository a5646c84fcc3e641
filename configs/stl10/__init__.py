"""Recipes for CIFAR-10, small enough for a CPU."""
