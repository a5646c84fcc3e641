"""The recipes; installed with the package, so that a command can name one without the source tree."""
