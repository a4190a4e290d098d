"""The command line: ``main`` and one file per verb, each imported only when its verb is called."""
