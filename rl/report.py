def samples(*a): pass
def curves(*a): return True
def read_log(p): return []
