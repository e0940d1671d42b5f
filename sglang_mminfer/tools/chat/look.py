"""The style of what the application adds to gradio's page."""

from __future__ import annotations

CSS = """
.mminfer-figures { font-size: 12px; color: var(--body-text-color-subdued); margin: 2px 0;
  font-variant-numeric: tabular-nums }
.mminfer-strip { display: block; width: 100%; min-width: 360px; height: 14px; border-radius: 3px;
  color: var(--body-text-color) }
.mminfer-gap { font-size: 12px; color: #b45309; margin-top: 2px }
.mminfer-wait { font-size: 13px; color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums }
.mminfer-wait::before { content: ""; display: inline-block; width: 8px; height: 8px; margin-right: 8px;
  border-radius: 50%; background: #2563eb; animation: mminfer-pulse 1.2s ease-in-out infinite }
@keyframes mminfer-pulse { 50% { opacity: 0.2 } }
.mminfer-failed, .mminfer-stopped { font-size: 14px; padding: 6px 10px; border-radius: 6px; overflow-wrap: anywhere }
.mminfer-failed { background: #fee2e2; color: #991b1b; border: 1px solid #fca5a5 }
.mminfer-stopped { background: #f1f5f9; color: #334155; border: 1px solid #cbd5e1 }
.mminfer-table { width: 100%; font-size: 12px; border-collapse: collapse }
.mminfer-table th { text-align: left; font-weight: 500; vertical-align: top; padding: 2px 8px 2px 0;
  white-space: nowrap; color: var(--body-text-color-subdued) }
.mminfer-table td { overflow-wrap: anywhere; padding: 2px 0; font-variant-numeric: tabular-nums }
#panel h3 { font-size: 13px; margin: 10px 0 4px }
.mminfer-legend { font-size: 11px; margin-top: 12px; color: var(--body-text-color-subdued) }
.mminfer-legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 4px 0 8px }
.mminfer-table, .mminfer-table * { border: none !important; background: none !important }
.mminfer-files { font-size: 12px; color: var(--body-text-color-subdued); text-align: right }
#chat .user:has(video, img, .mminfer-files) { padding: 0; border: none; background: none; box-shadow: none }
#chat .message-row { margin-bottom: 2px }
#chat video, #chat img { max-width: 280px; max-height: 180px; object-fit: contain; border-radius: 6px }
#chat .message-row:has(.mminfer-figures, .mminfer-files, .mminfer-wait) + .message-buttons,
#chat .message-row:has(video, img) + .message-buttons, #chat button[aria-label="Share"] { display: none }
footer { display: none !important }
"""
"""For the classes that words.py writes, and the elements that page.py names."""
