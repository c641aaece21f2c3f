def make_page(rows):
    return ""
