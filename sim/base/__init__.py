"""What every room uses: text, colours, files, progress."""
