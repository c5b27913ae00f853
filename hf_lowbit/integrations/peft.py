"""x"""
def register_all(): pass
