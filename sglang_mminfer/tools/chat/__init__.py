"""`mminfer chat`: a chat application with images and videos in every turn.

conversation.py   the turns, and what is sent                     no user interface
endpoint.py       a server: what it can do, and its answers       no user interface
uploads.py        the user's files, checked before they are sent  no user interface
reply.py          one answer and what it cost
strip.py          a picture of a prompt
words.py          what is told about an answer, as HTML
page.py           the conversation as gradio shows it, and the page around it
security.py       who may talk to the application, and what its page may load
command.py        the command
"""
