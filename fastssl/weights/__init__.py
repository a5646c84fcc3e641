"""Weights in and out: the authors' files, the layouts of other libraries, and one door to a backbone."""
