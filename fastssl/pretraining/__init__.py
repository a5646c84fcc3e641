"""One pretraining run: the trainer, what it prints before it starts, the online k-NN, and the bench of its step."""
