"""Protocols that train the whole network: classification, segmentation, detection."""
