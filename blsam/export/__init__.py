"""Encoder and decoder as files for other runtimes and for tools that open such files, checked against torch."""
