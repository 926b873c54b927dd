"""`blsam demo`: a page to click on. `photos` checks what comes in, `segmenter` makes masks, `exports` files of them,
`server` speaks HTTP, `page` is the Gradio page around the canvas in `static/`."""
