"""Where calibrations are kept: files of one service, or a Redis of many."""
