"""From files on disk to batches: samples, order, draws, decoding and crops."""
