"""The models under the names and tools of other libraries; each needs its library."""
