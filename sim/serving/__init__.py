"""The synthetic provider behind HTTP, and rehearsals against it."""
