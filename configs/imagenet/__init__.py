"""Recipes for ImageNet-1k."""
