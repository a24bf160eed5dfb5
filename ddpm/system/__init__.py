"""Files, signals, processes, devices and random numbers: what every other package builds on."""
