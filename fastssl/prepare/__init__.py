"""What comes before a run: part maps for SemMAE, a stand-in tokenizer for CAE, the demo's image set."""
