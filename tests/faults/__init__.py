"""Tools that break things on purpose: kills at chosen file-system calls, faked disk faults, ranks as threads."""
