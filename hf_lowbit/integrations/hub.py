"""x"""
def write_extras(model, folder, kept_card): pass
def push_to_hub(model, repo_id, **kw): pass
