"""Recipes for COCO."""
