"""What other libraries ask for by a class of their own: one small module for each, imported only with that library."""
