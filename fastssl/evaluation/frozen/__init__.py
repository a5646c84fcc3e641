"""Protocols that leave the backbone as it is: features once, then k-NN, linear and attentive probes, tables."""
