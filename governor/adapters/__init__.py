"""Classes that other libraries expect: one small module per library, imported only with that library."""
