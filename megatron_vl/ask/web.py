"""A dialogue on a page of this machine, by gradio.

Annotations are no strings here: gradio reads them, and is imported within.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from megatron_vl.ask.dialogue import Dialogue
from megatron_vl.errors import InputError, printable
from megatron_vl.models.media import IMAGE, VIDEO

_VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


def load_gradio():
    """The package. Raises InputError: it is not installed."""
    try:
        import gradio
    except ImportError as error:
        raise InputError(
            f"--web needs gradio, which cannot be imported ({error}); pip install "
            f"megatron-vl[web]."
        ) from error
    return gradio


def serve(dialogue: Callable[[], Dialogue], *, title: str, port: int) -> None:
    """Serve the page to this machine until Ctrl-C.

    Args:
        dialogue: begins a new one: every visitor has one of their own.
        port: 0: any that is free.

    Raises:
        InputError: the port is taken.
    """
    try:
        page(dialogue, title=title).launch(
            server_name="127.0.0.1", server_port=port or None, share=False
        )
    except OSError as error:  # gradio's, of a port that is taken
        raise InputError(f"--port {port} cannot be used ({error}); give another.") from error


def page(dialogue: Callable[[], Dialogue], *, title: str):
    """The page, a `gradio.Blocks` that is not yet served."""
    gradio = load_gradio()
    begun: dict[str, Dialogue] = {}  # by the visitor's session

    def answer(message: dict, history: list, request: gradio.Request) -> Iterator[dict]:
        """The answer so far, each time it grows."""
        if request.session_hash not in begun:
            begun[request.session_hash] = dialogue()
        one, said = begun[request.session_hash], ""
        # What the visitor took back, or asks again, is on the page no longer.
        one.rewind(sum(turn["role"] == "assistant" for turn in history))
        try:
            for file in message["files"]:
                # A question that is asked again has its files as the page keeps them.
                path = file["path"] if isinstance(file, dict) else file
                one.show(VIDEO if Path(path).suffix.lower() in _VIDEOS else IMAGE, path)
            with closing(one.ask(message["text"])) as pieces:
                for piece in pieces:
                    said += printable(piece)
                    yield _text(said)
            yield _text(said)  # also where the answer is empty
        except InputError as error:
            raise gradio.Error(str(error), print_exception=False) from error
        if not one.is_whole:
            gradio.Info(f"cut off after --max-new-tokens {one.sampling.max_new_tokens}")

    return gradio.ChatInterface(
        answer, multimodal=True, title=title, api_name="chat", analytics_enabled=False,
        # To the letter: as Markdown and HTML, <box> and line ends would be gone.
        chatbot=gradio.Chatbot(
            render_markdown=False, show_label=False, scale=1, buttons=["copy", "copy_all"]
        ),
    )


def _text(said: str) -> dict:
    """An answer to the letter; of a plain string gradio takes the indentation."""
    return {"role": "assistant", "content": [{"type": "text", "text": said}]}
