"""What mkdocs does with links that lead out of docs/: on GitHub they lead to the file, on the site there is none.

With a `repo_url` in mkdocs.yml they lead to the file there. Without one, their text stays and the link goes. A link
to a file that does not exist stays as it is, and `mkdocs build --strict` fails on it.
"""

import os
import re
from pathlib import Path

LINK = re.compile(r"\[([^][]*)\]\((\.\./[^)#\s]*)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page, config, **kwargs) -> str:
    docs = Path(config.docs_dir)

    def replace(link: re.Match) -> str:
        text, path, heading = link[1], link[2], link[3] or ""
        target = Path(os.path.normpath((docs / page.file.src_uri).parent / path))
        if target.is_relative_to(docs) or not target.exists():
            return link[0]
        if not config.repo_url:
            return text
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{target.relative_to(docs.parent)}{heading})"

    return LINK.sub(replace, markdown)
