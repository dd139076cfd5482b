"""Who owns which page of device memory, and the bytes behind the pages."""
