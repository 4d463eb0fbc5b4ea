"""The flagship: many growing files in, one packet file out, and out of it again."""
