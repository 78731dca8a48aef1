timeout 120 python3 scratch/t3.py 2>&1 | awk '{print $0}' | cut -c1-150 | tail -20
timeout 100 python3 scratch/time.py 2>&1 | grep -v Warn | tail -30
