"""Comparisons with tools that take minutes to install or compile; nothing here runs by itself."""
