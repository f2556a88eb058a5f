"""One module per step of the schema, in order; a step that has been released is never changed."""
