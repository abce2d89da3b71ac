"""What others made, files and modules: refused where it is not what it should be, before anything is done with it."""
