/* A window of a JPEG file as RGB pixels: one function on libjpeg-turbo, called through ctypes by window_decoder.py.

   Every block up to the window's last row is Huffman-decoded (a JPEG has no other way in); transform, upsampling and
   color conversion are done for the window alone, and nothing after its last row is decoded. No state outlives a call,
   so calls may run in many threads at once. Nothing here prints, exits or aborts. */

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>
#include <jerror.h>

#define MARGIN 4 /* columns beyond the window that smooth chroma upsampling reads: 1 chroma sample of 1 or 2 pixels */
#define ROWS 16  /* rows asked for at a time */

enum { DECODED, DAMAGED, LEFT_TO_OTHERS, HAS_APP1 };

struct trouble {
  struct jpeg_error_mgr manager; /* first, because libjpeg hands back its address */
  jmp_buf escape;
  int code;
};

static void give_up(j_common_ptr info) {
  struct trouble *trouble = (struct trouble *)info->err;
  trouble->code = LEFT_TO_OTHERS;
  longjmp(trouble->escape, 1);
}

/* After most warnings pixels are missing; the ones listed here are about oddities of whole data. */
static void on_warning(j_common_ptr info, int level) {
  struct trouble *trouble = (struct trouble *)info->err;
  if (level >= 0) return;
  switch (info->err->msg_code) {
    case JWRN_EXTRANEOUS_DATA:
    case JWRN_ADOBE_XFORM:
    case JWRN_BOGUS_ICC:
    case JWRN_BOGUS_PROGRESSION:
    case JWRN_JFIF_MAJOR:
    case JWRN_NOT_SEQUENTIAL:
      return;
  }
  trouble->code = DAMAGED;
  longjmp(trouble->escape, 1);
}

/* Neither a stuffed zero nor a fill byte nor a restart. */
static int is_marker(uint8_t code) { return code != 0 && code != 0xFF && (code < 0xD0 || code > 0xD7); }

/* Whether the file is whole, as scan in jpeg.py sees it, and has no stray bytes before its pixels: a walk over its
   segments up to the end-of-image marker. What the segments say is left to libjpeg. */
static int is_whole(const uint8_t *data, size_t size, int *app1) {
  size_t at = 2;
  int scans = 0;
  if (size < 2 || data[0] != 0xFF || data[1] != 0xD8) return 0;
  for (;;) {
    for (;; at++) {
      const uint8_t *found = at + 1 < size ? memchr(data + at, 0xFF, size - 1 - at) : NULL;
      if (!found || (found != data + at && !scans)) return 0;
      at = (size_t)(found - data);
      if (is_marker(data[at + 1])) break;
    }
    uint8_t code = data[at + 1];
    at += 2;
    if (code == 0xD9) return 1;
    if (code == 0x01 || code == 0xD8) continue;
    size_t length = at + 1 < size ? (size_t)data[at] << 8 | data[at + 1] : 2;
    if (length < 2 || at + length > size) return 0;
    if (code == 0xE1) *app1 = 1;
    if (code == 0xDA) scans++;
    at += length;
  }
}

/* Arguments:
     data, size: the JPEG file.
     height, width: of the image, as the caller expects it.
     as_stored: 0 where the image must be shown upright, so that an APP1 segment (EXIF) needs a look first.
     window: in: top, left, height, width of the wanted pixels, inside the image; out: of the pixels that were
       written: these rows, and at least these columns.
     out, capacity: where the pixels go, RGB, row after row; bytes that fit there.
     message: JMSG_LENGTH_MAX bytes, for libjpeg's words if the data is damaged.
   Returns DECODED; DAMAGED; LEFT_TO_OTHERS (not whole, not as expected, or a rare kind of JPEG); HAS_APP1. */
int fastssl_decode_window(const uint8_t *data, size_t size, int64_t height, int64_t width, int as_stored,
                          int64_t *window, uint8_t *out, size_t capacity, char *message) {
  struct jpeg_decompress_struct info;
  struct trouble trouble;
  int app1 = 0;
  if (!is_whole(data, size, &app1)) return LEFT_TO_OTHERS;
  if (app1 && !as_stored) return HAS_APP1;

  info.err = jpeg_std_error(&trouble.manager);
  trouble.manager.error_exit = give_up;
  trouble.manager.emit_message = on_warning;
  info.mem = NULL; /* for jpeg_destroy, should creation itself fail */
  if (setjmp(trouble.escape)) {
    if (trouble.code == DAMAGED) trouble.manager.format_message((j_common_ptr)&info, message);
    jpeg_destroy_decompress(&info);
    return trouble.code;
  }
  jpeg_create_decompress(&info);
  jpeg_mem_src(&info, (unsigned char *)data, (unsigned long)size);
  jpeg_read_header(&info, TRUE);
  int known = info.jpeg_color_space == JCS_YCbCr || info.jpeg_color_space == JCS_GRAYSCALE ||
              info.jpeg_color_space == JCS_RGB;
  if (!known || info.image_height != height || info.image_width != width) give_up((j_common_ptr)&info);
  info.out_color_space = JCS_RGB;
  info.dct_method = JDCT_ISLOW;
  info.do_fancy_upsampling = TRUE;
  jpeg_start_decompress(&info);

  int64_t top = window[0], left = window[1], bottom = top + window[2], right = left + window[3];
  if (top < 0 || left < 0 || bottom <= top || right <= left || bottom > height || right > width)
    give_up((j_common_ptr)&info);
  int64_t first = left > MARGIN ? left - MARGIN : 0, last = right + MARGIN < width ? right + MARGIN : width;
  JDIMENSION offset = (JDIMENSION)first, columns = (JDIMENSION)(last - first);
  if (columns < info.output_width) jpeg_crop_scanline(&info, &offset, &columns); /* widens to whole blocks */
  size_t stride = (size_t)columns * 3;
  if ((size_t)window[2] * stride > capacity) give_up((j_common_ptr)&info);
  window[1] = offset;
  window[3] = columns;
  if (top > 0) jpeg_skip_scanlines(&info, (JDIMENSION)top);
  while (info.output_scanline < bottom) {
    JSAMPROW rows[ROWS];
    JDIMENSION count = 0;
    for (int64_t y = info.output_scanline; y < bottom && count < ROWS; y++) rows[count++] = out + (y - top) * stride;
    if (!jpeg_read_scanlines(&info, rows, count)) give_up((j_common_ptr)&info);
  }
  jpeg_destroy_decompress(&info);
  return DECODED;
}
