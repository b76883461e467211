"""What every room may use: logging, words for errors, Ctrl-C, devices and prompts by name, how pipelines are told apart."""
