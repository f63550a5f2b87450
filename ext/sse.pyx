"""Server-sent event frames, and the JSON escaping of the text in them.

It knows bytes and str, not the dialects: which JSON surrounds a delta is its callers' business. The format
is that of the WHATWG's "Server-sent events": `field: value` lines, and an empty line that ends the event.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint32_t
from libc.string cimport memchr, memcpy


cdef extern from *:
    """
    #ifndef MLXD_DEBUG
    #define MLXD_DEBUG 0
    #endif
    """
    const bint DEBUG "MLXD_DEBUG"
    const void* PyUnicode_DATA(object text)


DONE = b"data: [DONE]\n\n"

cdef Py_ssize_t live_text_frames = 0

# What JSON asks for ASCII (RFC 8259, section 7): 0 for a character that stands for itself, else the letter
# after the backslash; u is followed by four hexadecimal digits.
cdef unsigned char[128] ESCAPE_LETTERS
cdef const char* HEX_DIGITS = b"0123456789abcdef"


cdef int prepare_escape_letters() except -1:
    cdef int code
    for code in range(128):
        ESCAPE_LETTERS[code] = c"u" if code < 0x20 else 0
    for code, letter in zip(b'"\\\b\f\n\r\t', b'"\\bfnrt'):
        ESCAPE_LETTERS[code] = letter
    return 0


prepare_escape_letters()


def live_objects():
    """Objects of this module now alive, by class. Empty unless built with MLXD_DEBUG=1."""
    return {"TextFrame": live_text_frames} if DEBUG else {}


cdef Py_ssize_t escaped_size(str text) except -1:
    """Bytes that write_escaped() will write."""
    cdef Py_ssize_t size = 0
    cdef uint32_t code
    for code in text:
        if code < 0x80:
            if ESCAPE_LETTERS[code] == 0:
                size += 1
            else:
                size += 6 if ESCAPE_LETTERS[code] == c"u" else 2
        elif code < 0x800:
            size += 2
        elif 0xD800 <= code <= 0xDFFF:
            size += 6
        else:
            size += 3 if code < 0x10000 else 4
    return size


cdef unsigned char* write_code_unit(unsigned char* out, uint32_t code) noexcept:
    """\\uXXXX for a code point below 0x10000."""
    out[0] = c"\\"
    out[1] = c"u"
    out[2] = HEX_DIGITS[code >> 12]
    out[3] = HEX_DIGITS[code >> 8 & 15]
    out[4] = HEX_DIGITS[code >> 4 & 15]
    out[5] = HEX_DIGITS[code & 15]
    return out + 6


cdef int write_escaped(unsigned char* out, str text, Py_ssize_t size) except -1:
    """Write `size` = escaped_size(text) bytes: UTF-8, with JSON's escapes.

    A lone surrogate has no UTF-8, so it is written as the escape that JSON has for it.
    """
    cdef unsigned char* at = out
    cdef uint32_t code
    if size == len(text):
        # Only ASCII that stands for itself takes one byte, and CPython stores such a str as these bytes.
        memcpy(out, PyUnicode_DATA(text), size)
        return 0
    for code in text:
        if code < 0x80:
            if ESCAPE_LETTERS[code] == 0:
                at[0] = code
                at += 1
            elif ESCAPE_LETTERS[code] == c"u":
                at = write_code_unit(at, code)
            else:
                at[0] = c"\\"
                at[1] = ESCAPE_LETTERS[code]
                at += 2
        elif code < 0x800:
            at[0] = 0xC0 | code >> 6
            at[1] = 0x80 | code & 0x3F
            at += 2
        elif 0xD800 <= code <= 0xDFFF:
            at = write_code_unit(at, code)
        elif code < 0x10000:
            at[0] = 0xE0 | code >> 12
            at[1] = 0x80 | code >> 6 & 0x3F
            at[2] = 0x80 | code & 0x3F
            at += 3
        else:
            at[0] = 0xF0 | code >> 18
            at[1] = 0x80 | code >> 12 & 0x3F
            at[2] = 0x80 | code >> 6 & 0x3F
            at[3] = 0x80 | code & 0x3F
            at += 4
    assert at == out + size
    return 0


cdef int check_one_line(bytes value) except -1:
    """A line break inside a value would end its field, and the client would see another event."""
    cdef const char* data = PyBytes_AS_STRING(value)
    cdef size_t size = PyBytes_GET_SIZE(value)
    if memchr(data, c"\n", size) is not NULL or memchr(data, c"\r", size) is not NULL:
        raise ValueError(f"a line break in {value[:80]!r}: a frame's values are one line each")
    return 0


def escape_json(str text not None):
    """`text` as the inside of a JSON string, without the quotes: UTF-8, only what must be escaped is.

    json.loads gives the text back, exactly. (A high surrogate right before a low one, which JSON cannot
    tell from the character that they spell, comes back as that character, as with json.dumps.)
    """
    cdef Py_ssize_t size = escaped_size(text)
    escaped = PyBytes_FromStringAndSize(NULL, size)
    write_escaped(<unsigned char*> PyBytes_AS_STRING(escaped), text, size)
    return escaped


def frame(bytes json not None):
    """One event of `json`, a value on one line. ValueError if there is a line break in it."""
    check_one_line(json)
    return b"data: " + json + b"\n\n"


def event_frame(event, bytes json not None):
    """One named event, as the Anthropic dialect has them; `event` is bytes or str. ValueError as `frame`."""
    cdef bytes name = event.encode() if isinstance(event, str) else event
    check_one_line(name)
    check_one_line(json)
    return b"event: " + name + b"\ndata: " + json + b"\n\n"


@cython.final
cdef class TextFrame:
    """The frames of one choice of a stream, which differ in one string.

    `prefix` is the JSON up to and including the quote that opens that string, `suffix` from the quote that
    closes it. ValueError if there is a line break in either.
    """

    cdef bytes head
    cdef bytes tail

    def __cinit__(self, bytes prefix not None, bytes suffix not None):
        global live_text_frames
        check_one_line(prefix)
        check_one_line(suffix)
        self.head = b"data: " + prefix
        self.tail = suffix + b"\n\n"
        if DEBUG:
            live_text_frames += 1

    def __dealloc__(self):
        global live_text_frames
        if DEBUG and self.tail is not None:
            live_text_frames -= 1

    def encode(self, str delta not None):
        """The whole frame that carries `delta`."""
        cdef Py_ssize_t head_size = PyBytes_GET_SIZE(self.head)
        cdef Py_ssize_t tail_size = PyBytes_GET_SIZE(self.tail)
        cdef Py_ssize_t size = escaped_size(delta)
        cdef unsigned char* out
        encoded = PyBytes_FromStringAndSize(NULL, head_size + size + tail_size)
        out = <unsigned char*> PyBytes_AS_STRING(encoded)
        memcpy(out, PyBytes_AS_STRING(self.head), head_size)
        write_escaped(out + head_size, delta, size)
        memcpy(out + head_size + size, PyBytes_AS_STRING(self.tail), tail_size)
        return encoded
