"""Collectors: hooks that are put on for some steps, read numbers, and are taken off again.

They change nothing: what they read they detach, they draw no random number, put nothing on a module (the hooks on forward
passes are process-wide, and look only at the modules of the training), and keep no reference to what a step makes. A collector that
fails stops collecting, and says so: training goes on. On an accelerator numbers are gathered there, and read once a step.
"""
