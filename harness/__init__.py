"""What check.py, bench.py and the tests share: verification against float64, diagnosis, PyTorch's competitors, reports."""
