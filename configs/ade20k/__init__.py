"""Recipes for ADE20K."""
