"""Processes for the tests in which what the project imports is there already.

Importing torch, Megatron-Core, transformers and energon takes a process longer than most tests
take. `nursery.py` imports them once for a test process, and forks every process that a test, or a
launcher under test, starts with this Python: see `start.py`. A test marked `cold` starts all of its
processes as a user does.

What only cold processes can show: that a command imports what it needs, and in an order that works;
and ranks that walk through a set each in an order of its own, for warm ones share a hash seed.
"""
